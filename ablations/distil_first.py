"""The first half of the cycles distils and takes no RL step; the second half is RL alone, so that
each phase has half of its updates. Tests that alternating re-grounds the scores as the answers move
(Sec. 3.3), and does not separate order from amount."""

import cycle


class InTurn(cycle.Run):
    def cycles(self):
        for number in super().cycles():
            self.first_half = number <= self.config.cycles // 2
            yield number

    def rl_step(self, *step):
        return None if self.first_half else super().rl_step(*step)

    def select(self, buffer, number):
        return super().select(buffer, number) if self.first_half else []


cycle.Run = InTurn
cycle.main()
