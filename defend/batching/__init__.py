"""From the batch a user trains on to the tensors a step works on, and back."""
