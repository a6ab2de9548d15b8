"""The `visionlora` command: one verb, one module; nothing heavy is imported before a verb runs."""
