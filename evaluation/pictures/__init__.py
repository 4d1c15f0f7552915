"""Pictures of what a net sees, drawn without a window system."""
