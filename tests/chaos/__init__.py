"""Real servers, workers and coordinators, killed, stopped and cut off at random, over and over."""
