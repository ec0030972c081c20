"""Knowledge distillation in JAX in which how much to trust the teacher is learned per sample."""

__version__ = "0.1.0"
