"""The public functions: argument checks, fake (meta) implementations, autograd."""
