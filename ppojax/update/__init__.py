"""Updates: train state, optimizers, and the jitted steps of actor and critic."""
