"""Helpers that exist only for the tests."""
