from algorithms.mt_sac import MTSAC
from algorithms.nn import mlp


class Deep(MTSAC):
    """MT-SAC whose actor has twice the layers."""

    PAPER = "me, tonight"

    def make_actor(self):
        c, s = self.config, self.suite
        return mlp(s.obs_dim, [c.width] * 2 * c.depth, 2 * s.action_dim, one_hot=s.num_tasks)
