"""Post-hoc invariance: any classifier, run on every copy of an image that a group makes of it."""
