"""Images: readers of folders and ImageNet trees, embedded data, samplers, batches, transforms."""
