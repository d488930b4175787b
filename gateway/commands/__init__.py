"""Sub-commands of ``gateway``, a module each: `register` adds its own to the application."""
