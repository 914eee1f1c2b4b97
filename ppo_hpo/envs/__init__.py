"""Environments: how they are made, checked and stepped."""
