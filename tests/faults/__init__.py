"""Ways to a wrong picture, each tried; and the guards against them, each shown to be needed."""
