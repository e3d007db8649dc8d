// Samples with a transformer that was compiled ahead of time with TeaCache in it. No Python is needed to run it.
//
//     sample transformer.pt2 job.pt result.pt
//
// job.pt is a dict of tensors as torch.save writes it, and result.pt a tuple (latents, seconds, skipped) for torch.load;
// examples/export_aoti.py writes the package and the job.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Tensors = std::unordered_map<std::string, at::Tensor>;
using Package = torch::inductor::AOTIModelPackageLoader;

const std::array<std::string, 2> kBranches = {"cond.", "uncond."};  // the contexts 0 and 1
constexpr int64_t kSkipped = 0;  // teacache_fx.policy.StepReason.SKIPPED

struct Result {
  at::Tensor latents;
  at::Tensor seconds;  // float64 [calls]
  at::Tensor skipped;  // bool [calls]
};

Tensors read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Tensors tensors;
  for (const auto& item : torch::jit::pickle_load(bytes).toGenericDict()) {
    tensors.emplace(item.key().toStringRef(), item.value().toTensor());
  }
  return tensors;
}

void write_result(const std::string& path, const Result& result) {
  const auto tuple = c10::ivalue::Tuple::create({result.latents, result.seconds, result.skipped});
  const std::vector<char> bytes = torch::jit::pickle_save(tuple);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error("cannot write " + path);
  }
}

const at::Tensor& part_of(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) {
    throw std::runtime_error("there is no tensor " + name);
  }
  return found->second;
}

// The package works on these tensors from now on, instead of buffers of its own, so that what it decides can be seen.
// A server keeps one such state per request. The tensors must live as long as the package works on them.
Tensors share_state(Package& package, const Tensors& job) {
  Tensors state;
  for (const std::string& name : package.get_constant_fqns()) {
    if (name.rfind("teacache.", 0) == 0) {
      state.emplace(name, part_of(job, name));
    }
  }
  package.load_constants(state, /*use_inactive=*/false, /*check_full_update=*/false, /*user_managed=*/true);
  return state;
}

// Euler's method from noise to latents, guided by two calls a step.
Result sample(Package& package, const Tensors& job) {
  const Tensors state = share_state(package, job);
  const at::Tensor sigmas = part_of(job, "sigmas");
  const int64_t steps = sigmas.size(0) - 1;
  at::Tensor latents = part_of(job, "latents");
  const at::Tensor seconds = at::zeros({steps, 2}, at::kDouble);
  const at::Tensor skipped = at::zeros({steps, 2}, at::kBool);
  for (int64_t step = 0; step < steps; ++step) {
    const at::Tensor timestep = sigmas[step].repeat({latents.size(0)});
    std::array<at::Tensor, 2> predicted;
    for (int64_t branch = 0; branch < 2; ++branch) {
      const std::string& prefix = kBranches[branch];
      const auto started = std::chrono::steady_clock::now();
      // In the order in which they were given to torch.export.
      predicted[branch] = package.run({
          latents,
          timestep,
          part_of(job, prefix + "encoder_hidden_states"),
          part_of(job, prefix + "pooled_projections"),
          part_of(job, prefix + "img_ids"),
          part_of(job, prefix + "txt_ids"),
          at::scalar_tensor(step == 0, at::kBool),  // teacache_reset: a new generation begins
          at::scalar_tensor(branch, at::kLong),     // teacache_context
      })[0];
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - started;
      seconds[step][branch] = elapsed.count();
      skipped[step][branch] = part_of(state, "teacache.reason")[branch].item<int64_t>() == kSkipped;
    }
    const at::Tensor velocity = predicted[1] + part_of(job, "guidance") * (predicted[0] - predicted[1]);
    latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity;
  }
  return {latents, seconds.flatten(), skipped.flatten()};
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s transformer.pt2 job.pt result.pt\n", arguments[0]);
    return 2;
  }
  // Otherwise a package reads beyond the end of a tensor that is smaller than it was compiled for.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);
  try {
    const c10::InferenceMode guard;
    const Tensors job = read_tensors(arguments[2]);
    Package package(arguments[1]);
    const Result result = sample(package, job);
    write_result(arguments[3], result);
    std::printf("%ld of %ld calls skipped: %s\n", static_cast<long>(result.skipped.sum().item<int64_t>()),
                static_cast<long>(result.skipped.numel()), arguments[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
