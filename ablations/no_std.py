"""Advantages are not divided by the group's standard deviation (DeepSeekMath's GRPO divides, Sec.
3.1), so that groups of nearly equal rewards move the policy less."""

import cycle


def centred(rewards, group_size):
    groups = rewards.view(-1, group_size)
    return (groups - groups.nanmean(1, keepdim=True)).nan_to_num(0).view(-1)


cycle.group_advantages = centred
cycle.main()
