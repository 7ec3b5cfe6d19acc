"""`kalm eval`: which deployment, model, prompt or dimension retrieves better on your texts."""
