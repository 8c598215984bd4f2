"""`neap bench roles`: goodput of static splits, colocation and roles that change, under a load that shifts."""
