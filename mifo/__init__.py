"""mifo: learn the individual things in one photo, each as its own word, and place each of them in new pictures."""

__version__ = "0.1.0"
