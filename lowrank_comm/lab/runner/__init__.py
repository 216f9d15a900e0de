"""Runs a preset's cases, keeps one row for each, and writes the pages."""
