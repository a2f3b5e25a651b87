"""The commands of launch.sh: `python -m api.cli COMMAND`, run in the project's own environment."""
