"""ClipCov: choose the part of an image-caption pool that is worth training CLIP on.

This package says *how* (plain functions over arrays, tables and files); the Dagster code location in
``assets`` says *what exists*. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
