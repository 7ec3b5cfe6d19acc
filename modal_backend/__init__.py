"""What runs beside the model: the service, its engines and its endpoints."""
