"""The command `ppo-hpo`: one module for each group of subcommands."""
