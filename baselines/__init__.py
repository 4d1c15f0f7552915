"""Other people's methods in our harness: each package one paper, siblings without an edge."""
