"""What is to be known of a model: its layers, how large its KV is, and which weights it has."""
