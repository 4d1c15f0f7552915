"""What a net costs: parameters, multiply-adds, images per second, memory, use of the device."""
