"""Verification of speculated tokens: which drafts the target accepts, and what it says instead."""
