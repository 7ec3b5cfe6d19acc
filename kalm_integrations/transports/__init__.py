"""How a client reaches a service: the protocol `Transport` in `base`, and its implementations."""
