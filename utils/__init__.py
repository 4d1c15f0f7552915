"""The framework's own tools: loop, checkpoint, data, config. Imports nothing else of ours."""
