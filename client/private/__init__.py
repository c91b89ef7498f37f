"""The step that bounds what one patient can do to a model: per-patient gradients, clipped and summed."""
