"""A small text-to-image Flux model: drawn scenes, a text encoder, a diffusers pipeline and a prompt checker."""
