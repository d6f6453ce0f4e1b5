"""The games: what is played, by whom without a model, and the processes that play it.

May import: the games' own libraries and the standard library. No torch, and nothing of ours from outside this folder.

game.py         Game, Observation, BadGame: the types
levels.py       which games there are, by split, task type and level of generalisation
alfworld.py     ALFWorld's engine, with a memory          houses.py    the generator of small households
scienceworld.py ScienceWorld's simulator, many in one Java machine
experts.py      how experts solve the tasks               players.py   experts, careful and careless, and random play
oracle.py       how far from the goal? which single actions bring it nearer; planner.py  exact distances in ALFWorld
pool.py         worker processes that play a batch of episodes, and are replaced when they die
"""
