"""Test tools for components of this library and of others."""
