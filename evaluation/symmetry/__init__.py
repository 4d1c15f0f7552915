"""The law f(g x) = g f(x) measured, and nets made invariant after training."""
