"""Recurrent networks small enough to follow by hand."""
