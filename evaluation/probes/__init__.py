"""Probes of a frozen net on labelled images: kNN, linear, logistic regression, attentive."""
