"""What the containers of bulk jobs do, without Modal."""
