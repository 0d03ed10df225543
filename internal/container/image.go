package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/image"
	"github.com/dustin/go-humanize"
)

// EnsureImage makes sure that an image is on this machine, by a pull policy ("" is "missing"),
// and returns its digest: "repository@sha256:…", which any instance can pull, or for an image
// that never came from a registry its ID, "sha256:…", which can only be found where it is.
// Both can be given as ref again. progress, if set, hears a line whenever there is news.
//
// ErrNoImage says that the image can't be had; with policy "always" an image that is here
// serves when the registry does not answer. A pull lasts as long as ctx lets it, but ends when
// nothing happens in it.
func (d *Docker) EnsureImage(ctx context.Context, ref, pull string, progress func(string)) (digest string, err error) {
	if progress == nil {
		progress = func(string) {}
	}
	switch pull {
	case "", PullMissing, PullAlways, PullNever:
	default:
		return "", fmt.Errorf("pull policy %q is not one of missing, always, never: %w", pull, ErrInvalidSpec)
	}
	digest, err = d.digest(ctx, ref)
	have := err == nil
	switch {
	case err != nil && !errors.Is(err, ErrNoImage):
		return "", err
	case have && pull != PullAlways:
		return digest, nil
	case strings.HasPrefix(ref, "sha256:"):
		if have {
			return digest, nil
		}
		return "", fmt.Errorf("image %s was never in a registry; load it on this instance too: %w", ref, ErrNoImage)
	case pull == PullNever:
		return "", fmt.Errorf("image %s is not here and pull is \"never\": %w", ref, ErrNoImage)
	}
	err = d.pull(ctx, ref, progress)
	switch {
	case err == nil:
		return d.digest(ctx, ref)
	case have && ctx.Err() == nil && !errors.Is(err, ErrUnavailable):
		d.cfg.Log.Warn("can't pull the image, using the one that is here", "image", ref, "error", err)
		return digest, nil
	}
	return "", err
}

// digest returns the digest of an image that is here.
func (d *Docker) digest(ctx context.Context, ref string) (string, error) {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	img, err := d.cli.ImageInspect(ctx, ref)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return "", fmt.Errorf("image %s: %w", ref, ErrNoImage)
		}
		return "", d.fail(ctx, "inspect image "+ref, err)
	}
	repo := repository(ref)
	for _, r := range img.RepoDigests {
		if repository(r) == repo {
			return r, nil
		}
	}
	if len(img.RepoDigests) > 0 {
		return img.RepoDigests[0], nil
	}
	return img.ID, nil
}

// repository is a reference without tag and digest, with Docker's own registry left out.
func repository(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref = ref[:i]
	}
	ref = strings.TrimPrefix(strings.TrimPrefix(ref, "index."), "docker.io/")
	return strings.TrimPrefix(ref, "library/")
}

// pull pulls, and gives up when nothing is heard for a while.
func (d *Docker) pull(ctx context.Context, ref string, progress func(string)) error {
	parent := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stall := time.AfterFunc(d.cfg.PullStall, cancel)
	defer stall.Stop()
	what := "pull image " + ref
	fail := func(err error) error {
		switch {
		case parent.Err() == nil && ctx.Err() != nil:
			err = fmt.Errorf("no progress for %s: %w", d.cfg.PullStall, ErrNoImage)
		case parent.Err() == nil && !isDown(err): // an answer: unknown, forbidden, unreachable registry
			err = fmt.Errorf("%w (%w)", ErrNoImage, err)
		}
		return d.fail(parent, what, err)
	}
	var opts image.PullOptions
	if d.cfg.RegistryAuth != nil {
		auth, err := d.cfg.RegistryAuth(ctx, ref)
		if err != nil {
			return fmt.Errorf("%s: get credentials: %w", what, err)
		}
		opts.RegistryAuth = auth
	}
	body, err := d.cli.ImagePull(ctx, ref, opts)
	if err != nil {
		return fail(err)
	}
	defer body.Close()
	report := pullReport{ref: ref, layers: map[string]layer{}, say: progress}
	for in := json.NewDecoder(body); ; {
		var m pullMessage
		if err := in.Decode(&m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fail(err)
		}
		stall.Reset(d.cfg.PullStall)
		if m.Error != "" {
			return fail(errors.New(m.Error))
		}
		report.add(m)
	}
}

// pullMessage is one line of what the daemon says during a pull.
type pullMessage struct {
	Status   string `json:"status"`
	ID       string `json:"id"`
	Progress struct {
		Current int64 `json:"current"`
		Total   int64 `json:"total"`
	} `json:"progressDetail"`
	Error string `json:"error"`
}

type layer struct{ done, total int64 }

// pullReport sums layers up and speaks when the whole percentage changes.
type pullReport struct {
	ref    string
	layers map[string]layer
	last   string
	say    func(string)
}

func (p *pullReport) add(m pullMessage) {
	l := p.layers[m.ID]
	switch m.Status {
	case "Downloading":
		l = layer{m.Progress.Current, m.Progress.Total}
	case "Download complete", "Pull complete", "Already exists":
		l.done = l.total
	default:
		return
	}
	p.layers[m.ID] = l
	var sum layer
	for _, l := range p.layers {
		sum.done += l.done
		sum.total += l.total
	}
	if sum.total == 0 {
		return
	}
	line := fmt.Sprintf("pulling %s: %d %% of %s", p.ref, 100*sum.done/sum.total, humanize.IBytes(uint64(sum.total)))
	if line != p.last {
		p.last = line
		p.say(line)
	}
}
