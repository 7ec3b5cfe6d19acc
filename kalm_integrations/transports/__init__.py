"""Ways to reach a service: one protocol (`base`), one module each."""
