"""Multiruns: composing, checking, running and recording many jobs."""
