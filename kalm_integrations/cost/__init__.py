"""What KaLM costs on each of Modal's GPUs, for a corpus and for traffic."""
