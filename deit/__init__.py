"""DeiT III: supervised training of any classifier. Imports `vit` and `utils` alone."""
