"""The methods as pure functions on tensors: selection rules, losses, metrics. Imports torch alone."""
