"""Drop-ins for transformers, TRL and Liger."""
