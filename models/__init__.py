"""What a model is, in the operations of `ondevice.backends.base`."""
