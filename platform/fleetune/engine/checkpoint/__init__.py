"""What a killed run goes on from: the server's state, and clients' private tensors."""
