"""What Orion imports when it makes an algorithm: it turns on `lean`, `orionfixes` and `promote`, no more.

An entry point of Orion's group ``BaseAlgorithm`` is the only thing of ours that a plain ``orion hunt``
loads, and one that fails would break every algorithm of everybody. So nothing that goes wrong here gets
out.
"""

loaded = True
try:
    from ppo_hpo.orion import speedups

    speedups.install()
except Exception:  # Orion does without
    loaded = False
    import logging

    logging.getLogger("ppo_hpo").warning("Orion is left as it is", exc_info=True)
try:
    from ppo_hpo.orion import fixes, promote

    if fixes.install():
        promote.install()
except Exception:
    loaded = False
    import logging

    logging.getLogger("ppo_hpo").warning("Orion's mistakes are left as they are", exc_info=True)
