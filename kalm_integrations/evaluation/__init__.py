"""How far two deployments agree, on the user's own texts."""
