"""Engines beside transformers' own generate: one decode step captured and replayed, compiled before it or not."""
