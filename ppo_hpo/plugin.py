"""What Orion imports when it makes an algorithm. It installs the patches of the modules that it names.

An entry point of Orion's group ``BaseAlgorithm`` is the only code of ppo_hpo that a plain ``orion hunt``
loads. An entry point that fails would break every algorithm for every user of Orion, so all errors are logged
here and go no further.
"""

loaded = True
for _module in ("speedups", "fixes", "hunt_space"):
    try:
        from importlib import import_module

        import_module(f"ppo_hpo.orion.{_module}").install()
    except Exception:  # Orion works without the patches.
        loaded = False
        import logging

        logging.getLogger("ppo_hpo").warning("ppo_hpo could not install its %s", _module, exc_info=True)
