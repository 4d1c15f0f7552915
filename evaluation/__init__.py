"""Probes that judge any Backbone. May import vit and utils, never a recipe or an octic net."""
