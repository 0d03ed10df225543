package track

func agentMain() int { return 0 }
