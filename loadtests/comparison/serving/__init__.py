"""What runs in processes of its own beside the gateway: the other contestants, and the model behind HTTP."""
